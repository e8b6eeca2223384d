"""Tables and figures of finished runs, like the paper's."""
