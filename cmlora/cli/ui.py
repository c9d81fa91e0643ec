"""`cmlora ui`: the browser interface."""

from cmlora.ui.command import ui as ui
