#!/usr/bin/env bash
# The tests of tests/conformance that run hundreds of containers to see whether a shim grows.
#
# Environment:
#   NUTSHELL_TEST_DIRECT  the test program, set by tests/run (tests/conformance/build builds it)
NUTSHELL_TEST_FILTER=growth::
source "$(dirname "$0")/direct.sh"
