#![no_main]

use nutshell::fuzz::access_registers;

libfuzzer_sys::fuzz_target!(|data: &[u8]| access_registers(data));
