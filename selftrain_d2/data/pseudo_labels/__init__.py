"""The pseudo-label folder: written, verified, loaded, exchanged."""
