"""Native code: how a library of ours is loaded, and the sources of the packer's."""
