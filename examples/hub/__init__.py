"""An artifact in a repository of the Hugging Face Hub, or in a folder that looks like one."""
