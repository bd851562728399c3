#![no_main]

use nutshell::fuzz::plan_sandbox;

libfuzzer_sys::fuzz_target!(|data: &[u8]| plan_sandbox(data));
