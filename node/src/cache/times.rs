//! Protobuf's durations and instants as milliseconds, checked.

use holdfast_proto::timeline::{FOREVER, Millis};

use crate::error::Error;

/// As many seconds as protobuf allows a duration: 10,000 years. It stands for ever.
pub(super) const FOREVER_SECONDS: i64 = 315_576_000_000;

/// What is above nothing and below a millisecond is one.
pub(super) fn millis(
    field: &'static str,
    duration: prost_types::Duration,
) -> Result<Millis, Error> {
    let prost_types::Duration { seconds, nanos } = duration;
    if seconds < 0 || nanos < 0 {
        return Err(Error::field(field, "it is negative"));
    }
    if nanos > 999_999_999 || seconds > FOREVER_SECONDS {
        return Err(Error::field(field, "it is no duration of protobuf's"));
    }
    if seconds == FOREVER_SECONDS {
        return Ok(FOREVER);
    }
    Ok(seconds.unsigned_abs() * 1000 + u64::from(nanos.unsigned_abs()).div_ceil(1_000_000))
}

pub(super) fn instant(field: &'static str, at: prost_types::Timestamp) -> Result<Millis, Error> {
    /// The last second of the year 9999, as far as protobuf goes.
    const SECONDS_MAX: i64 = 253_402_300_799;
    let prost_types::Timestamp { seconds, nanos } = at;
    if !(0..=SECONDS_MAX).contains(&seconds) || !(0..=999_999_999).contains(&nanos) {
        return Err(Error::field(
            field,
            "it is not between the years 1970 and 9999",
        ));
    }
    Ok(seconds.unsigned_abs() * 1000 + u64::from(nanos.unsigned_abs()) / 1_000_000)
}
