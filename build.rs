//! Embeds the guest's kernel and initramfs, where the environment names them.
//!
//! Without them the executable still builds, for checks and unit tests: it then says that it needs
//! a configuration file that points to a guest.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let mut source = String::new();
    for (name, variable) in [
        ("KERNEL", "NUTSHELL_GUEST_KERNEL"),
        ("INITRAMFS", "NUTSHELL_GUEST_INITRAMFS"),
    ] {
        println!("cargo::rerun-if-env-changed={variable}");
        let bytes = match env::var_os(variable) {
            Some(path) => {
                let named = PathBuf::from(path);
                let path =
                    fs::canonicalize(&named).map_err(|error| format!("{variable}={}: {error}", named.display()))?;
                println!("cargo::rerun-if-changed={}", path.display());
                format!("*include_bytes!({path:?})")
            }
            None => "[]".to_owned(),
        };
        source.push_str(&format!("static {name}: &PageAligned<[u8]> = &PageAligned({bytes});\n"));
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR for build scripts")?);
    fs::write(out.join("embedded_guest.rs"), source)?;
    Ok(())
}
