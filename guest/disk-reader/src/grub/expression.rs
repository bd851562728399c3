//! Tests of GRUB's shell: the arguments of `test` and `[`.

use std::cmp::Ordering;

/// How deep negations and parentheses may be nested. Generated files do not nest them.
const MAX_DEPTH: usize = 16;

/// The file tests `-e`, `-f`, `-d` and `-s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileTest {
    Exists,
    IsFile,
    IsDirectory,
    HasContent,
}

/// Evaluates a test. One that is malformed is false, as in GRUB.
pub(super) fn evaluate(arguments: &[String], test_file: &dyn Fn(&str, FileTest) -> bool) -> bool {
    let mut expression = Expression {
        rest: arguments,
        depth: 0,
        test_file,
    };
    let value = expression.alternatives();
    value.unwrap_or(false) && expression.rest.is_empty()
}

struct Expression<'a> {
    rest: &'a [String],
    depth: usize,
    test_file: &'a dyn Fn(&str, FileTest) -> bool,
}

impl Expression<'_> {
    fn skip(&mut self, word: &str) -> bool {
        let is_next = self.rest.first().is_some_and(|next| next == word);
        if is_next {
            self.rest = &self.rest[1..];
        }
        is_next
    }

    fn alternatives(&mut self) -> Option<bool> {
        let mut value = self.conjunction()?;
        while self.skip("-o") {
            value |= self.conjunction()?;
        }
        Some(value)
    }

    fn conjunction(&mut self) -> Option<bool> {
        let mut value = self.term()?;
        while self.skip("-a") {
            value &= self.term()?;
        }
        Some(value)
    }

    fn term(&mut self) -> Option<bool> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let value = self.shallow_term();
        self.depth -= 1;
        value
    }

    fn shallow_term(&mut self) -> Option<bool> {
        if let [left, operator, right, rest @ ..] = self.rest
            && let Some(value) = compare(left, operator, right)
        {
            self.rest = rest;
            return Some(value);
        }
        if self.skip("!") {
            return self.term().map(|value| !value);
        }
        if self.skip("(") {
            let value = self.alternatives()?;
            return self.skip(")").then_some(value);
        }
        let (first, rest) = self.rest.split_first()?;
        let unary = rest.split_first().and_then(|(operand, rest)| {
            let value = match first.as_str() {
                "-n" => !operand.is_empty(),
                "-z" => operand.is_empty(),
                "-e" => (self.test_file)(operand, FileTest::Exists),
                "-f" => (self.test_file)(operand, FileTest::IsFile),
                "-d" => (self.test_file)(operand, FileTest::IsDirectory),
                "-s" => (self.test_file)(operand, FileTest::HasContent),
                _ => return None,
            };
            Some((value, rest))
        });
        let (value, rest) = unary.unwrap_or((!first.is_empty(), rest));
        self.rest = rest;
        Some(value)
    }
}

/// Returns `None` if `operator` is not a comparison operator.
fn compare(left: &str, operator: &str, right: &str) -> Option<bool> {
    // As strtoul(3): what is not a number is zero.
    let number = |text: &str| {
        let digits = text.trim_start_matches('-');
        let end = digits
            .find(|character: char| !character.is_ascii_digit())
            .unwrap_or(digits.len());
        let value = digits[..end].parse::<i64>().unwrap_or_default();
        if text.starts_with('-') { -value } else { value }
    };
    let numbers = |is_match: fn(Ordering) -> bool| is_match(number(left).cmp(&number(right)));
    Some(match operator {
        "=" | "==" => left == right,
        "!=" => left != right,
        "<" => left < right,
        "<=" => left <= right,
        ">" => left > right,
        ">=" => left >= right,
        "-eq" => numbers(Ordering::is_eq),
        "-ne" => numbers(Ordering::is_ne),
        "-lt" => numbers(Ordering::is_lt),
        "-le" => numbers(Ordering::is_le),
        "-gt" => numbers(Ordering::is_gt),
        "-ge" => numbers(Ordering::is_ge),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_evaluated_as_by_grub() {
        let test_file = |path: &str, test: FileTest| match path {
            "/file" => test != FileTest::IsDirectory,
            "/directory" => matches!(test, FileTest::Exists | FileTest::IsDirectory),
            _ => false,
        };
        for (arguments, expected) in [
            (&["xy", "=", "xy"][..], true),
            (&["x", "=", "xy"], false),
            (&["x", "!=", "xy"], true),
            (&["10", "-gt", "9"], true),
            (&["10", ">", "9"], false),
            (&["a", "-eq", "0"], true),
            (&["-1", "-lt", "0"], true),
            (&[], false),
            (&[""], false),
            (&["x"], true),
            (&["-n"], true),
            (&["-n", ""], false),
            (&["-z", ""], true),
            (&["!", "-z", ""], false),
            (&["!", "a", "=", "b"], true),
            (&["a", "=", "b", "-o", "c", "=", "c"], true),
            (&["a", "=", "b", "-o", "c", "=", "c", "-a", "d", "=", "e"], false),
            (&["(", "a", "=", "b", "-o", "c", "=", "c", ")", "-a", "d"], true),
            (&["-f", "/file"], true),
            (&["-s", "/file"], true),
            (&["-d", "/file"], false),
            (&["-e", "/directory"], true),
            (&["-e", "/other"], false),
            (&["("], false),
            (&["a", "b"], false),
        ] {
            let words: Vec<_> = arguments.iter().map(|word| (*word).to_owned()).collect();
            assert_eq!(evaluate(&words, &test_file), expected, "{arguments:?}");
        }
    }

    #[test]
    fn deeply_nested_test_is_false() {
        for word in ["!", "("] {
            let words = vec![word.to_owned(); 100_000];
            assert!(!evaluate(&words, &|_, _| true), "{word}");
        }
    }
}
