"""Several processes of one run on this machine: started, watched and ended together.

``local.run`` is what a launcher calls. It loads neither torch nor any of a stage's libraries: what it costs beside the
processes is a Python interpreter.
"""
