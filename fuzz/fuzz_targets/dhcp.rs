#![no_main]

use nutshell::fuzz::answer_request;

libfuzzer_sys::fuzz_target!(|data: &[u8]| answer_request(data));
