#!/usr/bin/env bash
# Docker Engine with its option `--runtime io.containerd.nutshell.v2`, on containerd 2.1.
#
# Environment:
#   NUTSHELL_TEST_FILTER   runs only the tests whose name contains this text
# Takes about 8 minutes.
source "$(dirname "$0")/../lab/test.bash"
source "$(dirname "$0")/../lab/docker.bash"
source "$(dirname "$0")/../cases/docker.bash"
source "$(dirname "$0")/../cases/docker_network.bash"
source "$(dirname "$0")/../cases/docker_environment.bash"
set_up_containerd 2.1
set_up_docker

docker_cases
docker_network_cases
docker_environment_cases
remove_docker
finish
