"""A model behind HTTP, as OpenAI's clients expect it. docs/serving.md is for those who run it.

    Gate (limits.py) -> routes (app.py) -> completions.py, chat.py, view.py -> EngineWorker (worker.py) -> Engine

Requests live on one event loop; the engine, and with it the model, belongs to one thread of its own. What passes
between the two is a job with its requests, and the events of each step.
"""
