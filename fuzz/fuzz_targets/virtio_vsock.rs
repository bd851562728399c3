#![no_main]

use nutshell::fuzz::exchange_packets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| exchange_packets(data));
