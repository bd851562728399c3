//! Order of versions (UAPI Group Specification UAPI.10, "Version Format Specification").

use std::cmp::Ordering;

/// Compares two versions. The newer one is the greater one. Takes time linear in their lengths.
pub(crate) fn compare(left: &str, right: &str) -> Ordering {
    let (mut left, mut right) = (left.as_bytes(), right.as_bytes());
    loop {
        (left, right) = (skip_invalid(left), skip_invalid(right));
        // A version with a tilde is a pre-release, and older than one that ends here.
        if let Some(order) = compare_separator(&mut left, &mut right, b'~') {
            return order;
        }
        match (left.is_empty(), right.is_empty()) {
            (true, true) => return Ordering::Equal,
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (false, false) => {}
        }
        for separator in [b'-', b'^', b'.'] {
            if let Some(order) = compare_separator(&mut left, &mut right, separator) {
                return order;
            }
        }
        let is_number = starts_with_digit(left) || starts_with_digit(right);
        let is_part = if is_number {
            u8::is_ascii_digit
        } else {
            u8::is_ascii_alphabetic
        };
        let (left_part, right_part) = (take(&mut left, is_part), take(&mut right, is_part));
        let order = if is_number {
            let (left_part, right_part) = (skip_zeros(left_part), skip_zeros(right_part));
            // A missing number is older than zero.
            (left_part.map(<[u8]>::len), left_part).cmp(&(right_part.map(<[u8]>::len), right_part))
        } else {
            left_part.cmp(right_part)
        };
        if order.is_ne() {
            return order;
        }
    }
}

fn skip_invalid(text: &[u8]) -> &[u8] {
    let is_valid = |byte: &u8| byte.is_ascii_alphanumeric() || b"~-^.".contains(byte);
    &text[text.iter().position(is_valid).unwrap_or(text.len())..]
}

/// Returns the order if only one text starts with `separator`; that one is older. Removes it from both if both do.
fn compare_separator(left: &mut &[u8], right: &mut &[u8], separator: u8) -> Option<Ordering> {
    match (left.strip_prefix(&[separator]), right.strip_prefix(&[separator])) {
        (None, None) => None,
        (Some(_), None) => Some(Ordering::Less),
        (None, Some(_)) => Some(Ordering::Greater),
        (Some(left_rest), Some(right_rest)) => {
            (*left, *right) = (left_rest, right_rest);
            None
        }
    }
}

fn starts_with_digit(text: &[u8]) -> bool {
    text.first().is_some_and(u8::is_ascii_digit)
}

fn take<'t>(text: &mut &'t [u8], is_part: fn(&u8) -> bool) -> &'t [u8] {
    let end = text.iter().position(|byte| !is_part(byte)).unwrap_or(text.len());
    let (part, rest) = text.split_at(end);
    *text = rest;
    part
}

/// Returns the digits without leading zeros, or `None` if there are no digits.
fn skip_zeros(digits: &[u8]) -> Option<&[u8]> {
    let start = digits.iter().position(|digit| *digit != b'0').unwrap_or(digits.len());
    (!digits.is_empty()).then(|| &digits[start..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_in_the_order_of_the_specification() {
        // Each line is in ascending order.
        for versions in [
            &["", "a"][..],
            &[
                "122.1",
                "123~rc1-1",
                "123",
                "123-a",
                "123-a.1",
                "123-1",
                "123-1.1",
                "123^post1",
                "123.a-1",
                "123.1-1",
            ],
            &["123a-1", "124-1"],
            &["5.14.0-70.el9", "5.14.0-70.13.1.el9_0", "5.14.0-362.8.1.el9_3"],
            &[
                "6.1.0-9-amd64",
                "6.1.0-18-amd64",
                "6.1.0-21-cloud-amd64",
                "6.12.5-amd64",
            ],
            &["6.5.0~rc3", "6.5.0", "6.5.1"],
            &["0-rescue-abc", "6.8.0"],
            &["00001", "2"],
            &["A", "a", "aa", "b"],
        ] {
            for pair in versions.windows(2) {
                assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
                assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
            }
        }
    }

    #[test]
    fn versions_that_differ_in_ignored_characters_are_equal() {
        for (left, right) in [("", ""), ("1_2", "1 2"), ("01", "1"), ("\u{e4}1", "1"), ("a.b", "a.b")] {
            assert_eq!(compare(left, right), Ordering::Equal, "{left} {right}");
        }
    }
}
