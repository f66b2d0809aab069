"""What boards are. How to compile for one is another package's."""

if __name__ == "targets":
    raise ImportError("this folder is the package exitify.targets: import it by that name")
