#!/usr/bin/env bash
# How nutshell gets onto a node (deploy/), as far as it takes a machine that boots guests; tests/deploy has
# the rest.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../cases/deploy.bash"
: >/run/containerd.log
make_node

for version in 2.1 1.7; do
  use_containerd "$version"
  cp --remove-destination "$("$lab/containerd" "$version")/ctr" /run/bin/ctr
  check "$version: installed on a node whose containerd runs with the handler" containerd_runs_with_the_handler
done
umount /usr/local/bin /etc/containerd
finish
