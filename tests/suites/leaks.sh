#!/usr/bin/env bash
# The tests of tests/conformance that run hundreds of containers to see whether a shim leaks.
#
# Environment:
#   NUTSHELL_TEST_DIRECT  the test program, set by tests/run (tests/conformance/build builds it)
NUTSHELL_TEST_FILTER=leaks::
source "$(dirname "$0")/direct.sh"
