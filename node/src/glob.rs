//! The patterns of policies, over bytes, as keys are.
//!
//! ```text
//! *       any bytes, `/` too, none too; captured, leftmost and shortest
//! ?       one byte
//! [a-z_]  one byte of these; [!a-z_] one byte of all others
//! \x      the byte x itself
//! ```
//!
//! Promises a match in time `key × pattern` at worst, whatever the pattern: between two stars
//! everything has a fixed length, and if the pieces fit anywhere they fit at their leftmost places,
//! so nothing is ever tried again. Must never know what a pattern is for.

use std::fmt;

/// Longest pattern: a key cannot be longer, though a pattern with sets could.
pub const PATTERN_BYTES_MAX: usize = 1024;

/// A parsed pattern.
#[derive(Clone, PartialEq, Eq)]
pub struct Glob {
    text: String,
    /// What lies between the stars: one piece more than there are stars.
    pieces: Vec<Vec<Unit>>,
}

/// `*`: every key.
impl Default for Glob {
    fn default() -> Self {
        Self {
            text: "*".to_owned(),
            pieces: vec![Vec::new(); 2],
        }
    }
}

/// What the stars of a pattern stood for in one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captures<'k>(Vec<&'k [u8]>);

/// Why a pattern is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GlobError {
    #[error("the pattern is empty")]
    Empty,
    #[error("the pattern is over {PATTERN_BYTES_MAX} bytes")]
    TooLong,
    #[error("a `[` without its `]`; write `\\[` for the bracket itself")]
    UnclosedSet,
    #[error("`[]` has no bytes to choose from; write `\\[` for the bracket itself")]
    EmptySet,
    #[error("the range `{0}-{1}` runs backwards")]
    BackwardsRange(char, char),
    #[error("`{0}` in `[…]` is more than one byte: only ASCII may be there")]
    WideInSet(char),
    #[error("`\\` at the end escapes nothing; write `\\\\` for the backslash itself")]
    LoneEscape,
}

/// Matches exactly one byte.
#[derive(Clone, PartialEq, Eq)]
enum Unit {
    Byte(u8),
    Any,
    Set {
        ranges: Vec<(u8, u8)>,
        negated: bool,
    },
}

/// A part of a pattern, as patterns are compared.
#[derive(Clone, PartialEq, Eq)]
enum Atom {
    Star,
    /// One byte of these, a bit each.
    Bytes([u128; 2]),
}

impl Glob {
    pub fn parse(text: &str) -> Result<Self, GlobError> {
        if text.is_empty() {
            return Err(GlobError::Empty);
        }
        if text.len() > PATTERN_BYTES_MAX {
            return Err(GlobError::TooLong);
        }
        let mut pieces = Vec::new();
        let mut piece = Vec::new();
        let mut chars = text.chars();
        while let Some(char) = chars.next() {
            match char {
                '*' => pieces.push(std::mem::take(&mut piece)),
                '?' => piece.push(Unit::Any),
                '[' => piece.push(parse_set(&mut chars)?),
                '\\' => push_literal(&mut piece, chars.next().ok_or(GlobError::LoneEscape)?),
                literal => push_literal(&mut piece, literal),
            }
        }
        pieces.push(piece);
        Ok(Self {
            text: text.to_owned(),
            pieces,
        })
    }

    /// What it captures, counted.
    pub fn stars(&self) -> usize {
        self.pieces.len() - 1
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it matches all that `other` does, as far as can be seen: a yes is sure, and a no that
    /// is none takes patterns that nobody writes.
    pub fn covers(&self, other: &Self) -> bool {
        let (own, others) = (self.atoms(), other.atoms());
        let mut pieces: Vec<&[Atom]> = own.split(|atom| *atom == Atom::Star).collect();
        let Some(last) = pieces.pop() else {
            return false;
        };
        if pieces.is_empty() {
            return others.len() == last.len() && starts_covered(&others, last);
        }
        let first = pieces.remove(0);
        if !starts_covered(&others, first) {
            return false;
        }
        let mut at = first.len();
        for piece in pieces {
            let ends = others.len().checked_sub(piece.len());
            let found = ends
                .and_then(|end| (at..=end).find(|&start| starts_covered(&others[start..], piece)));
            let Some(start) = found else { return false };
            at = start + piece.len();
        }
        let end = others.len().checked_sub(last.len());
        end.is_some_and(|end| end >= at && starts_covered(&others[end..], last))
    }

    /// In one order where several mean the same: `?` before `*`, and one `*` for many.
    fn atoms(&self) -> Vec<Atom> {
        let mut atoms: Vec<Atom> = Vec::new();
        for (index, piece) in self.pieces.iter().enumerate() {
            if index > 0 && atoms.last() != Some(&Atom::Star) {
                atoms.push(Atom::Star);
            }
            for unit in piece {
                let atom = Atom::Bytes(unit.bytes());
                if *unit == Unit::Any && atoms.last() == Some(&Atom::Star) {
                    atoms.insert(atoms.len() - 1, atom);
                } else {
                    atoms.push(atom);
                }
            }
        }
        atoms
    }

    /// `None` if the key does not match.
    pub fn captures<'k>(&self, key: &'k [u8]) -> Option<Captures<'k>> {
        let mut captured = Vec::new();
        self.walk(key, |capture| captured.push(capture))?;
        Some(Captures(captured))
    }

    /// As `captures`, for who asks nothing more: keeps nothing.
    pub fn matches(&self, key: &[u8]) -> bool {
        self.walk(key, |_| {}).is_some()
    }

    /// What each star stands for, in order; meaningless if there is no match in the end.
    fn walk<'k>(&self, key: &'k [u8], mut capture: impl FnMut(&'k [u8])) -> Option<()> {
        let (first, others) = self.pieces.split_first()?;
        if !starts_with(key, first) {
            return None;
        }
        let Some((last, middle)) = others.split_last() else {
            return (key.len() == first.len()).then_some(());
        };
        let mut at = first.len();
        for piece in middle {
            let skipped = (at..=key.len().checked_sub(piece.len())?)
                .find(|&start| starts_with(&key[start..], piece))?;
            capture(&key[at..skipped]);
            at = skipped + piece.len();
        }
        let end = key.len().checked_sub(last.len()).filter(|&end| end >= at)?;
        if !starts_with(&key[end..], last) {
            return None;
        }
        capture(&key[at..end]);
        Some(())
    }
}

impl fmt::Debug for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Glob({:?})", self.text)
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl<'k> Captures<'k> {
    /// Counted from 1, as templates do.
    pub fn get(&self, number: usize) -> Option<&'k [u8]> {
        self.0.get(number.checked_sub(1)?).copied()
    }

    /// In order, the first at 0.
    pub fn as_slice(&self) -> &[&'k [u8]] {
        &self.0
    }
}

impl Unit {
    /// Those that it matches.
    fn bytes(&self) -> [u128; 2] {
        let mut bits = [0; 2];
        for byte in (0..=u8::MAX).filter(|byte| self.matches(*byte)) {
            bits[usize::from(byte >> 7)] |= 1 << (byte & 0x7f);
        }
        bits
    }

    fn matches(&self, byte: u8) -> bool {
        match self {
            Self::Byte(own) => *own == byte,
            Self::Any => true,
            Self::Set { ranges, negated } => {
                ranges
                    .iter()
                    .any(|(low, high)| (*low..=*high).contains(&byte))
                    != *negated
            }
        }
    }
}

/// Whether whatever these stand for, it begins as `piece`, which has no star, wants it.
fn starts_covered(atoms: &[Atom], piece: &[Atom]) -> bool {
    let is_covered = |(atom, wanted): (&Atom, &Atom)| match (atom, wanted) {
        (Atom::Bytes(some), Atom::Bytes(wanted)) => some
            .iter()
            .zip(wanted)
            .all(|(some, wanted)| some & !wanted == 0),
        _ => false,
    };
    atoms.len() >= piece.len() && atoms.iter().zip(piece).all(is_covered)
}

fn starts_with(key: &[u8], piece: &[Unit]) -> bool {
    key.len() >= piece.len()
        && piece
            .iter()
            .zip(key)
            .all(|(unit, byte)| unit.matches(*byte))
}

fn push_literal(piece: &mut Vec<Unit>, char: char) {
    piece.extend(char.encode_utf8(&mut [0; 4]).bytes().map(Unit::Byte));
}

/// What follows a `[`, through its `]`.
fn parse_set(chars: &mut std::str::Chars<'_>) -> Result<Unit, GlobError> {
    let negated = chars.as_str().starts_with('!');
    if negated {
        chars.next();
    }
    let mut ranges = Vec::new();
    while let Some(low) = set_byte(chars)? {
        // A `-` before the `]` stands for itself.
        let is_range = chars.as_str().starts_with('-') && !chars.as_str().starts_with("-]");
        let high = if is_range {
            chars.next();
            set_byte(chars)?.ok_or(GlobError::UnclosedSet)?
        } else {
            low
        };
        if low > high {
            return Err(GlobError::BackwardsRange(low.into(), high.into()));
        }
        ranges.push((low, high));
    }
    if ranges.is_empty() {
        return Err(GlobError::EmptySet);
    }
    Ok(Unit::Set { ranges, negated })
}

/// The next byte of a set; `None` at its end.
fn set_byte(chars: &mut std::str::Chars<'_>) -> Result<Option<u8>, GlobError> {
    let char = match chars.next().ok_or(GlobError::UnclosedSet)? {
        ']' => return Ok(None),
        '\\' => chars.next().ok_or(GlobError::LoneEscape)?,
        char => char,
    };
    if char.is_ascii() {
        Ok(Some(char as u8))
    } else {
        Err(GlobError::WideInSet(char))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn captured(pattern: &str, key: &str) -> Option<Vec<String>> {
        let glob = Glob::parse(pattern).unwrap();
        let captures = glob.captures(key.as_bytes())?;
        Some(
            (1..=glob.stars())
                .map(|n| String::from_utf8_lossy(captures.get(n).unwrap()).into_owned())
                .collect(),
        )
    }

    #[test]
    fn a_star_is_captured_leftmost_and_shortest_and_crosses_slashes() {
        for (pattern, key, expected) in [
            ("user/*/profile", "user/7/profile", Some(vec!["7"])),
            ("user/*/profile", "user/7/8/profile", Some(vec!["7/8"])),
            ("user/*/profile", "user//profile", Some(vec![""])),
            ("*/*", "a/b/c", Some(vec!["a", "b/c"])),
            ("*-*-end", "a-b-end-end", Some(vec!["a", "b-end"])),
            ("**", "ab", Some(vec!["", "ab"])),
            ("*", "", Some(vec![""])),
            ("a*a", "a", None),
            ("a*a", "aa", Some(vec![""])),
            ("plain", "plain", Some(vec![])),
            ("plain", "plainer", None),
            ("plain", "plai", None),
        ] {
            let expected =
                expected.map(|all| all.into_iter().map(str::to_owned).collect::<Vec<_>>());
            assert_eq!(
                Glob::parse(pattern).unwrap().matches(key.as_bytes()),
                expected.is_some(),
                "{pattern} on {key}"
            );
            assert_eq!(captured(pattern, key), expected, "{pattern} on {key}");
        }
    }

    #[test]
    fn one_byte_wildcards_sets_and_escapes_match_and_do_not_capture() {
        for (pattern, key, matches) in [
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("[a-c]x", "bx", true),
            ("[a-c]x", "dx", false),
            ("[!a-c]x", "dx", true),
            ("[!a-c]x", "ax", false),
            ("[a-]", "-", true),
            ("[-a]", "-", true),
            (r"[\]]", "]", true),
            (r"\*", "*", true),
            (r"\*", "a", false),
            (r"\?\[\\", r"?[\", true),
            ("é", "é", true),
            ("??", "é", true),
        ] {
            assert_eq!(
                captured(pattern, key),
                matches.then(Vec::new),
                "{pattern} on {key}"
            );
        }
    }

    #[test]
    fn keys_that_are_not_text_match_too() {
        let glob = Glob::parse("a*b").unwrap();
        assert_eq!(
            glob.captures(b"a\xff\x00b").unwrap().as_slice(),
            [b"\xff\x00".as_slice()]
        );
        assert_eq!(glob.captures(b"a\xffb").unwrap().get(0), None);
        assert_eq!(glob.captures(b"a\xffb").unwrap().get(2), None);
    }

    #[test]
    fn a_pattern_covers_what_it_matches_all_of() {
        let covers = |one: &str, other: &str| {
            Glob::parse(one)
                .unwrap()
                .covers(&Glob::parse(other).unwrap())
        };
        for (wide, narrow) in [
            ("*", "a"),
            ("*", "a*b?[c-e]"),
            ("**", "*"),
            ("a*", "a/*/b"),
            ("*b", "a*b"),
            ("*/*/x", "a/b/c/x"),
            ("user/*", "user/*/profile"),
            ("user/*", "user/[0-9]*"),
            ("a?c", "abc"),
            ("a?c", "a[a-f]c"),
            ("[a-z]", "[c-f]"),
            ("[!a]", "[b-z]"),
            ("?*", "*?"),
            ("*?*?", "?*?"),
            (r"\*", r"[*]"),
            ("same", "same"),
        ] {
            assert!(covers(wide, narrow), "{wide} covers {narrow}");
        }
        for (narrow, wide) in [
            ("a", "*"),
            ("a*", "*"),
            ("user/*/profile", "user/*"),
            ("a?c", "a*c"),
            ("*?", "*"),
            ("a*a", "a"),
            ("[a-f]", "[a-g]"),
            ("?", "??"),
            ("*a*", "*b*"),
            ("x*", "?*"),
        ] {
            assert!(!covers(narrow, wide), "{narrow} does not cover {wide}");
        }
    }

    proptest! {
        #[test]
        fn whoever_covers_matches_too(one in "[ab*?]{1,5}", other in "[ab*?]{1,5}", key in "[ab]{0,6}") {
            let [one, other] = [one, other].map(|text| Glob::parse(&text).unwrap());
            if one.covers(&other) && other.matches(key.as_bytes()) {
                prop_assert!(one.matches(key.as_bytes()));
            }
        }
    }

    #[test]
    fn a_pattern_that_cannot_be_read_says_why() {
        for (pattern, error) in [
            ("", GlobError::Empty),
            ("a[b", GlobError::UnclosedSet),
            ("a[b-", GlobError::UnclosedSet),
            ("[]", GlobError::EmptySet),
            ("[!]", GlobError::EmptySet),
            ("[z-a]", GlobError::BackwardsRange('z', 'a')),
            ("[é]", GlobError::WideInSet('é')),
            ("a\\", GlobError::LoneEscape),
            ("[\\", GlobError::LoneEscape),
            (&"x".repeat(PATTERN_BYTES_MAX + 1), GlobError::TooLong),
        ] {
            assert_eq!(Glob::parse(pattern), Err(error), "{pattern}");
        }
    }

    #[test]
    fn a_pattern_of_many_stars_does_not_blow_up() {
        // Trying again at each star would take more steps than there are atoms.
        let glob = Glob::parse(&format!("{}b", "*a".repeat(500))).unwrap();
        assert!(glob.captures(&[b'a'; 1024]).is_none());
        assert!(
            Glob::parse("*a*a*a*a*b")
                .unwrap()
                .captures(&[b'a'; 1024])
                .is_none()
        );
    }

    /// What a lazy regular expression does: each star as short as the rest allows, the first one
    /// first.
    fn naive(pieces: &[Token], key: &[u8]) -> Option<Vec<Vec<u8>>> {
        let Some((first, rest)) = pieces.split_first() else {
            return key.is_empty().then(Vec::new);
        };
        if let Token::Star = first {
            return (0..=key.len()).find_map(|length| {
                let mut found = naive(rest, &key[length..])?;
                found.insert(0, key[..length].to_vec());
                Some(found)
            });
        }
        let (byte, key) = key.split_first()?;
        let matches = match first {
            Token::Star => false,
            Token::Any => true,
            Token::Byte(own) => own == byte,
            Token::Not(own) => own != byte,
        };
        if matches { naive(rest, key) } else { None }
    }

    #[derive(Debug, Clone)]
    enum Token {
        Star,
        Any,
        Byte(u8),
        Not(u8),
    }

    fn token() -> impl Strategy<Value = Token> {
        let byte = || prop_oneof![Just(b'a'), Just(b'b'), Just(b'/')];
        prop_oneof![
            Just(Token::Star),
            Just(Token::Any),
            byte().prop_map(Token::Byte),
            byte().prop_map(Token::Not)
        ]
    }

    fn written(tokens: &[Token]) -> String {
        tokens
            .iter()
            .map(|token| match token {
                Token::Star => "*".to_owned(),
                Token::Any => "?".to_owned(),
                Token::Byte(byte) => (*byte as char).to_string(),
                Token::Not(byte) => format!("[!{}]", *byte as char),
            })
            .collect()
    }

    proptest! {
        #[test]
        fn it_captures_what_trying_everything_would(tokens in prop::collection::vec(token(), 1..8), key in "[ab/]{0,10}") {
            let glob = Glob::parse(&written(&tokens)).unwrap();
            let captures = glob.captures(key.as_bytes()).map(|all| all.as_slice().iter().map(|one| one.to_vec()).collect::<Vec<_>>());
            prop_assert_eq!(captures, naive(&tokens, key.as_bytes()));
        }

        #[test]
        fn any_text_is_refused_or_matches_without_panic(pattern in any::<String>(), key in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(glob) = Glob::parse(&pattern) {
                let captures = glob.captures(&key);
                prop_assert!(captures.is_none_or(|captures| captures.as_slice().len() == glob.stars()));
            }
        }

        #[test]
        fn escaped_text_matches_itself_only(text in "[a-z*?\\[\\]\\\\!é-]{1,12}", other in "[a-z*?\\[\\]\\\\!é-]{1,12}") {
            let pattern: String = text.chars().flat_map(|char| ['\\', char]).collect();
            let glob = Glob::parse(&pattern).unwrap();
            prop_assert!(glob.captures(text.as_bytes()).is_some());
            prop_assert_eq!(glob.captures(other.as_bytes()).is_some(), other == text);
        }
    }
}
