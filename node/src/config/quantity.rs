//! Times and sizes as people write them: always with a unit.

use std::time::Duration;

/// Longest time that is not `forever`.
const DURATION_MAX: Duration = Duration::from_secs(100 * 31_557_600);

/// More are a slip.
const FRACTION_DIGITS_MAX: usize = 9;

const UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

/// `4s`, `1h 30m`, `250ms`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    if is_number(text) {
        return Err(bare_time(text));
    }
    if has_unit(text, "M") {
        return Err(format!(
            "`{text}` is ambiguous: `M` is a month and no minute; write `min`, `ms` or `d`"
        ));
    }
    let duration = humantime::parse_duration(text)
        .map_err(|_| format!("`{text}` is not a time; write it like `60s`, `10min` or `30d`"))?;
    if duration.subsec_nanos() % 1_000_000 != 0 {
        return Err(format!("`{text}` is finer than a millisecond"));
    }
    if duration > DURATION_MAX {
        return Err(format!("`{text}` is longer than 100 years"));
    }
    Ok(duration)
}

/// `512MiB`, `1GB`, `100B`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    if is_number(text) {
        return Err(bare_size(text));
    }
    let wrong = || {
        format!(
            "`{text}` is not a size; write a number and B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, such as `512MiB`"
        )
    };
    let (unit, bytes) = UNITS
        .iter()
        .find(|(unit, _)| text.ends_with(unit))
        .ok_or_else(wrong)?;
    let count = text.strip_suffix(unit).unwrap_or(text).trim();
    let (whole, fraction) = count.split_once('.').unwrap_or((count, "0"));
    let is_number =
        |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) || fraction.len() > FRACTION_DIGITS_MAX {
        return Err(wrong());
    }
    // Of so few digits the parts fit.
    let scale = 10u128.pow(fraction.len() as u32);
    let part = fraction.parse::<u128>().unwrap_or_default() * u128::from(*bytes) / scale;
    whole
        .parse::<u64>()
        .ok()
        .and_then(|whole| whole.checked_mul(*bytes))
        .and_then(|whole| whole.checked_add(u64::try_from(part).ok()?))
        .ok_or_else(|| format!("`{text}` is too large a size"))
}

/// Whether a number in it has exactly this unit.
fn has_unit(text: &str, unit: &str) -> bool {
    text.split(|c: char| c.is_ascii_digit() || c.is_whitespace() || c == '.')
        .any(|word| word == unit)
}

pub(super) fn bare_time(number: &str) -> String {
    format!("the bare number {number} is not a time: write `{number}s`")
}

pub(super) fn bare_size(number: &str) -> String {
    format!("the bare number {number} is not a size: write `{number}B`, or `{number}MiB`")
}

fn is_number(text: &str) -> bool {
    text.parse::<f64>().is_ok_and(f64::is_finite)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit_and_whole_milliseconds() {
        for (text, ms) in [
            ("60s", 60_000),
            ("0s", 0),
            ("100ms", 100),
            ("1h 30m", 5_400_000),
            ("10min", 600_000),
            ("30d", 2_592_000_000),
            ("5m", 300_000),
            ("1.5s", 1_500),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(ms)),
                "{text}"
            );
        }
        for (text, reason) in [
            ("60", "write `60s`"),
            ("0", "write `0s`"),
            ("1.5", "write `1.5s`"),
            ("-1", "bare number"),
            ("-1s", "not a time"),
            ("", "not a time"),
            ("soon", "not a time"),
            ("10us", "finer than a millisecond"),
            ("5M", "`M` is a month and no minute"),
            ("1h 5M", "`M` is a month and no minute"),
            ("101y", "longer than 100 years"),
            ("99999999999999999999s", "not a time"),
        ] {
            let error = parse_duration(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_have_a_unit() {
        for (text, bytes) in [
            ("0B", 0),
            ("100B", 100),
            ("8MiB", 8 << 20),
            ("8 MiB", 8 << 20),
            ("1GB", 1_000_000_000),
            ("2kB", 2_000),
            ("1TiB", 1 << 40),
            ("1.5MiB", 3 << 19),
            ("0.001 GB", 1_000_000),
            ("1.25kB", 1_250),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for (text, reason) in [
            ("100", "write `100B`"),
            ("0", "bare number"),
            ("1e6", "bare number"),
            ("MiB", "not a size"),
            ("1.MiB", "not a size"),
            (".5MiB", "not a size"),
            ("1.5.5MiB", "not a size"),
            ("1.0000000001GiB", "not a size"),
            ("-1MiB", "not a size"),
            ("8M", "not a size"),
            ("8Mi", "not a size"),
            ("99999999999TiB", "too large"),
        ] {
            let error = parse_size(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
