"""An artifact as a service."""
