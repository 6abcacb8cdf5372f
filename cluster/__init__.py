"""Where it runs: the Ray session and the placement of expert pools."""
