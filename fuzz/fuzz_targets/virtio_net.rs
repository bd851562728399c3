#![no_main]

use nutshell::fuzz::move_packets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| move_packets(data));
