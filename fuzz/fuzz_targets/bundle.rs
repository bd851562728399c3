#![no_main]

use nutshell::fuzz::plan_bundle;

libfuzzer_sys::fuzz_target!(|data: &[u8]| plan_bundle(data));
