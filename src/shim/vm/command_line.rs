//! The command line of a user's kernel.

/// The kernel argument that selects the serial port as the console.
const CONSOLE: &str = "console=ttyS0";

/// The kernel argument that makes the kernel reset the machine a second after a panic, instead of halting for good. The
/// kernel removes the quotation marks. They hide the argument from an initramfs that would reboot instead of opening
/// its rescue shell if it found the argument (initramfs-tools).
const RESET_ON_PANIC: &str = "\"panic=1\"";

/// The kernel's command line: `line` and the user's arguments. Adds the argument for the serial console unless one of
/// them has it, and likewise the one for the reset after a panic. What follows the word `--` is for the init process,
/// and comes last.
pub(super) fn complete_command_line(line: &str, arguments: &str) -> String {
    let (line, init) = split_init_arguments(line);
    let (arguments, more_init) = split_init_arguments(arguments);
    // The kernel removes quotation marks around an argument.
    let all_words: Vec<_> = words(line).into_iter().chain(words(arguments)).collect();
    let words = || all_words.iter().map(|(_, word)| word.trim_matches('"'));
    let names_console = |word: &str| word == CONSOLE || word.starts_with("console=ttyS0,");
    let console = if words().any(names_console) { "" } else { CONSOLE };
    let handles_panic = |word: &str| word.starts_with("panic=");
    let panic = if words().any(handles_panic) { "" } else { RESET_ON_PANIC };
    let separator = if init.is_some() || more_init.is_some() {
        "--"
    } else {
        ""
    };
    let (init, more_init) = (init.unwrap_or_default(), more_init.unwrap_or_default());
    let parts = [panic, line, console, arguments, separator, init, more_init];
    let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join(" ")
}

/// The words of a command line, with their positions. White space within quotation marks belongs to a word (Linux
/// `lib/cmdline.c`, `next_arg`).
fn words(line: &str) -> Vec<(usize, &str)> {
    let (mut words, mut start, mut is_quoted) = (Vec::new(), 0, false);
    for (index, byte) in line.bytes().chain([b' ']).enumerate() {
        is_quoted ^= byte == b'"';
        if index == line.len() || (!is_quoted && byte.is_ascii_whitespace()) {
            let word = line.get(start..index).unwrap_or_default();
            if !word.is_empty() {
                words.push((start, word));
            }
            start = index + 1;
        }
    }
    words
}

/// Splits a command line at its first word `--` (Linux `kernel/params.c`, `parse_args`). `None` without this word.
fn split_init_arguments(line: &str) -> (&str, Option<&str>) {
    let words = words(line);
    let separator = words.iter().find(|(_, word)| matches!(*word, "--" | "\"--\""));
    match separator {
        Some((start, word)) => {
            let kernel = line.get(..*start).unwrap_or_default();
            let init = line.get(start + word.len()..).unwrap_or_default();
            (kernel.trim(), Some(init.trim()))
        }
        None => (line.trim(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_gets_console_and_reset_after_a_panic_unless_it_has_them() {
        for (line, arguments, expected) in [
            ("root=/dev/vda1 ro", "", "\"panic=1\" root=/dev/vda1 ro console=ttyS0"),
            ("", "", "\"panic=1\" console=ttyS0"),
            (
                "console=tty0 console=ttyS0,115200 ",
                "quiet",
                "\"panic=1\" console=tty0 console=ttyS0,115200 quiet",
            ),
            (
                "a -- single",
                "console=ttyS0 b",
                "\"panic=1\" a console=ttyS0 b -- single",
            ),
            (
                "a -- console=ttyS0 panic=0",
                "b --  c",
                "\"panic=1\" a console=ttyS0 b -- console=ttyS0 panic=0 c",
            ),
            ("a=\"b -- c\" --", "", "\"panic=1\" a=\"b -- c\" console=ttyS0 --"),
            ("a--b --c", "d", "\"panic=1\" a--b --c console=ttyS0 d"),
            ("console=ttyS01", "", "\"panic=1\" console=ttyS01 console=ttyS0"),
            ("panic=0", "", "panic=0 console=ttyS0"),
            ("panic_on_oops=1", "panic=-1", "panic_on_oops=1 console=ttyS0 panic=-1"),
            ("\"panic=5\"", "", "\"panic=5\" console=ttyS0"),
            ("\"console=ttyS0\"", "", "\"panic=1\" \"console=ttyS0\""),
            (
                "a=\"b panic=0 c\" d=\"e console=ttyS0\"",
                "",
                "\"panic=1\" a=\"b panic=0 c\" d=\"e console=ttyS0\" console=ttyS0",
            ),
        ] {
            assert_eq!(complete_command_line(line, arguments), expected);
        }
    }
}
