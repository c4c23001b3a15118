"""What was measured, as files that others load: written, checked in a process without quantlab, described, pushed.

``backends/part.py`` says how a format plugs in.
"""
