"""What stands between raw rows and training: personal data, duplicates, leaks, quality, licences."""
