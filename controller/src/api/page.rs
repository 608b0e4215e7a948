//! Pages: a token is the last key of the page before, bound to the list that it continues.

use super::errors::invalid;
use crate::workflows::Refusal;

const PAGE_DEFAULT: u32 = 100;
const PAGE_MAX: u32 = 1000;

/// How many rows, 100 when nothing is asked, never more than 1000.
pub(super) fn size(asked: u32) -> usize {
    let size = if asked == 0 { PAGE_DEFAULT } else { asked.min(PAGE_MAX) };
    usize::try_from(size).unwrap_or(usize::MAX)
}

/// Reads a token of the list that `filter` describes; empty begins at the front.
pub(super) fn after(token: &str, filter: &str) -> Result<String, Refusal> {
    if token.is_empty() {
        return Ok(String::new());
    }
    let read = || {
        let bytes = (0..token.len()).step_by(2).map(|at| token.get(at..at + 2).and_then(hex_byte));
        let text = String::from_utf8(bytes.collect::<Option<Vec<u8>>>()?).ok()?;
        let (its_filter, key) = text.rsplit_once('\n')?;
        (its_filter == filter).then(|| key.to_owned())
    };
    read().ok_or_else(|| {
        let expected = "the next_page_token of the same list with the same filter";
        invalid("page_token", token, expected)
    })
}

/// Two hex digits, and nothing else: integers may also begin with a sign.
pub(super) fn hex_byte(pair: &str) -> Option<u8> {
    let digits = pair.len() == 2 && pair.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
}

/// One page of `rows` (which begin behind `after`), and the next page's token.
pub(super) fn cut<T>(
    mut rows: Vec<T>,
    size: usize,
    filter: &str,
    key: impl Fn(&T) -> String,
) -> (Vec<T>, String) {
    if rows.len() <= size {
        return (rows, String::new());
    }
    rows.truncate(size);
    let last = rows.last().map(key).unwrap_or_default();
    let token = format!("{filter}\n{last}").bytes().map(|byte| format!("{byte:02x}")).collect();
    (rows, token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_continues_its_own_list_only() {
        let (page, token) = cut(vec!["a", "b", "c"], 2, "on=host1", |key| (*key).to_owned());
        assert_eq!(page, ["a", "b"]);
        assert_eq!(after(&token, "on=host1").unwrap(), "b");
        assert!(after(&token, "on=host2").is_err());
        assert!(after("zz", "on=host1").is_err());
        assert!(after("é", "").is_err());
        // "\n+" would read as "\n\u{b}".
        assert!(after("0a+b", "").is_err());
        assert_eq!(after("0a0b", "").unwrap(), "\u{b}");
        let (page, token) = cut(vec!["c"], 2, "on=host1", |key| (*key).to_owned());
        assert_eq!((page, token), (vec!["c"], String::new()));
    }
}
