"""Where stages run: Ray clusters on this machine, connections to them, worker groups, manifests."""
