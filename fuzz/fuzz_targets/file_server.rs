#![no_main]

use nutshell::fuzz::receive_replies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| receive_replies(data));
