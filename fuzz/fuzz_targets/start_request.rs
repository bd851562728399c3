#![no_main]

use nutshell::fuzz::parse_start_request;

libfuzzer_sys::fuzz_target!(|data: &[u8]| parse_start_request(data));
