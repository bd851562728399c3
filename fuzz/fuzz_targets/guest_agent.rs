#![no_main]

use nutshell::fuzz::receive_answers;

libfuzzer_sys::fuzz_target!(|data: &[u8]| receive_answers(data));
