"""The daemon that keeps the experts of a host in shared RAM, and the packer."""
