"""Other people's frameworks. Each module needs the package that it is named after; none is imported unasked."""
