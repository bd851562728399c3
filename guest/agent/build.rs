//! Links the agent without its tables for unwinding and backtraces. The script `build` beside this file makes the agent
//! abort on a panic, so nothing reads them, and each guest has the whole file in memory.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=link.ld");
    // Only the script `build` makes a static release.
    let features = env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    let is_static = features.split(',').any(|feature| feature == "crt-static");
    let is_release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    if let (true, true, Ok(directory)) = (is_static, is_release, env::var("CARGO_MANIFEST_DIR")) {
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{directory}/link.ld,--no-eh-frame-hdr");
    }
}
