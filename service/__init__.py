"""The merge service: an HTTP API and a page over the same recipes, plans and merges.

command   starts it: `python start.py`, or `llama-merge serve`
app       puts the parts together: `create_app(settings)`
settings  what can be set, by file, environment and command line
api       the JSON API; `schemas` says what goes in and out, `safety` who may ask, and how often
studio    the pages, from `templates/` and `static/`; `studio_methods` has the methods' words
store     experiments and their jobs, in SQLite
runner    starts a worker process for each job, and takes care of those that died
worker    what such a process does: a merge, or an evaluation
planner   a process that reads models and plans merges, so that the server never does
registry  the models that there are, by id
requests  what a client asks for, as a recipe
archive   a folder as a ZIP that is never written down, of which any part can be asked for

The server itself opens no model and imports neither numba nor torch: it stays small.
"""
