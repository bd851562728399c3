#![no_main]

use nutshell::fuzz::parse_chains;

libfuzzer_sys::fuzz_target!(|data: &[u8]| parse_chains(data));
