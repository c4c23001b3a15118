"""quantlab's tests: a folder for each wing of the package, and support/ for what several of them share."""
