#![no_main]

use nutshell::fuzz::receive_control_messages;

libfuzzer_sys::fuzz_target!(|data: &[u8]| receive_control_messages(data));
