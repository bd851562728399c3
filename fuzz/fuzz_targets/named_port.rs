#![no_main]

use nutshell::fuzz::control_port;

libfuzzer_sys::fuzz_target!(|data: &[u8]| control_port(data));
