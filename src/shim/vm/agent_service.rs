//! The start of nutshell's agent in the guest of a user's disk, as a service.
//!
//! The agent's program is a disk of the machine. A guest with systemd 256 or newer gets the service by credentials
//! (SMBIOS, systemd.system-credentials(7)), and any other guest with cloud-init by the vendor data of its seed. Nothing
//! is written to the guest's disks.

use data_encoding::BASE64;

/// The systemd unit of the agent's service.
const UNIT: &str = "nutshell-agent.service";

/// Copies the agent's program from its disk, and executes it in place of the shell. It uses only commands and options
/// that BusyBox has too. The program is copied to a separate file system, because distributions mount `/run` with
/// `noexec`. Each newline can be replaced by a space.
const START_SCRIPT: &str = include_str!("start-agent.sh");

/// [`START_SCRIPT`] in one line.
fn start_script() -> String {
    let words: Vec<_> = START_SCRIPT.lines().map(str::trim).collect();
    words.join(" ")
}

/// The content of [`UNIT`].
fn unit() -> String {
    // systemd expands `$` and `%` in the command.
    let script = start_script().replace('$', "$$").replace('%', "%%");
    format!(
        "[Unit]\n\
         Description=Agent of the container runtime nutshell\n\
         After=local-fs.target\n\
         StartLimitIntervalSec=0\n\
         [Service]\n\
         ExecStart=/bin/sh -c '{script}'\n\
         Restart=always\n\
         RestartSec=1\n\
         OOMScoreAdjust=-900\n"
    )
}

/// The SMBIOS strings that make systemd run the service.
pub(super) fn oem_strings() -> Vec<String> {
    let credential = |name: String, text: &str| {
        let value = BASE64.encode(text.as_bytes());
        format!("io.systemd.credential.binary:{name}={value}")
    };
    let wants = format!("[Unit]\nWants={UNIT}\n");
    vec![
        credential(format!("systemd.extra-unit.{UNIT}"), &unit()),
        credential("systemd.unit-dropin.multi-user.target~nutshell".to_owned(), &wants),
    ]
}

/// The vendor data that makes cloud-init run the service at each boot, unless systemd has it from credentials. Without
/// systemd, the agent runs in the background.
pub(super) fn vendor_data() -> Vec<u8> {
    let script = format!(
        "if [ ! -d /run/systemd/system ]; then\n\
         setsid sh -c '{}' </dev/null >/dev/null 2>&1 &\n\
         elif ! systemctl cat {UNIT} >/dev/null 2>&1; then\n\
         cat >/run/systemd/system/{UNIT} <<'END'\n\
         {}\
         END\n\
         systemctl daemon-reload\n\
         systemctl start --no-block {UNIT}\n\
         fi\n",
        start_script(),
        unit()
    );
    let indented: String = script.lines().map(|line| format!("    {line}\n")).collect();
    format!("#cloud-config\nbootcmd:\n- |\n{indented}").into_bytes()
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;

    #[test]
    fn unit_has_no_error_that_systemd_finds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(UNIT);
        fs::write(&path, unit()).unwrap();
        // Debian's package systemd contains the program.
        let verified = Command::new("systemd-analyze")
            .arg("verify")
            .arg("--man=no")
            .arg(&path)
            .output();
        let verified = verified.unwrap();
        let text = String::from_utf8_lossy(&verified.stderr);
        assert!(!text.contains(UNIT), "{text}");
    }

    #[test]
    fn script_names_the_disk_and_is_in_the_documentation() {
        let condition = format!("\"$(cat $b/serial)\" = {} ]", nutshell_protocol::AGENT_DISK);
        assert!(START_SCRIPT.contains(&condition));
        assert!(include_str!("../../../docs/VM.md").contains(START_SCRIPT));
    }

    #[test]
    fn script_has_the_syntax_of_a_shell() {
        let checked = Command::new("sh").args(["-n", "-c", &start_script()]).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    }

    #[test]
    fn credentials_are_the_unit_and_its_activation() {
        let [service, activation] = &oem_strings()[..] else {
            panic!("not two strings");
        };
        let decode = |text: &str, name: &str| {
            let value = text
                .strip_prefix(&format!("io.systemd.credential.binary:{name}="))
                .unwrap();
            String::from_utf8(BASE64.decode(value.as_bytes()).unwrap()).unwrap()
        };
        let service = decode(service, "systemd.extra-unit.nutshell-agent.service");
        assert!(service.contains("cat /dev/$$(basename $$b)"), "{service}");
        let activation = decode(activation, "systemd.unit-dropin.multi-user.target~nutshell");
        assert_eq!(activation, "[Unit]\nWants=nutshell-agent.service\n");
    }

    #[test]
    fn vendor_data_writes_the_unit_as_it_is() {
        let text = String::from_utf8(vendor_data()).unwrap();
        let script = text.strip_prefix("#cloud-config\nbootcmd:\n- |\n").unwrap();
        let script: String = script.lines().map(|line| format!("{}\n", &line[4..])).collect();
        let (_, rest) = script.split_once("<<'END'\n").unwrap();
        let (written, _) = rest.split_once("END\n").unwrap();
        assert_eq!(written, unit());
        let checked = Command::new("sh").args(["-n", "-c", &script]).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    }
}
