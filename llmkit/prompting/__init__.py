"""Prompt templates, their demonstrations, and the checks that need a tokenizer only.

- ``template.load_template(path) -> PromptTemplate``: ``render(case, examples)``, ``answer(case)``, ``used_variables``
- ``few_shot.Demonstrations(template.few_shot, folder=…, variables=…, embed=…).pick(case)``; ``template.demonstrations()``
- ``report``: ``Case``, ``Subject``, ``Issue``, ``StaticReport``, ``CHECKS``
- ``static.check_static(template, subject, cases, *, max_length=None, prices=Prices(), demonstrations=None)``
- ``static.compare_versions(old, new, subject, cases)``: what changed between two versions of a template
- ``show.show_terminal(views, console)`` and ``show.show_html(views)``, of ``show.views(template, subject, cases)``
"""
