#![no_main]

use nutshell_protocol::fuzz::receive_messages;

libfuzzer_sys::fuzz_target!(|data: &[u8]| receive_messages(data));
