"""The browser interface: compose, compare, understand, judge. Started by `cmlora ui`."""
