"""The benchmark: ours and what users would pick instead, in one run, beside what the machine allows.

`python -m bench --help`; README.md says what each workload does, and what is fair about it. It uses the SDK
as a user does. Only `generate` knows the engine's own modules: it writes large directories without a
daemon.
"""
