"""One module a kind of personal data, or a few that are alike. Each finds; none knows what is done with the finding."""
