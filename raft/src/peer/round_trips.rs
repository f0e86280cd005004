//! How long a message takes to each peer and back.
//!
//! What counts is the way itself: the least of the latest answers. What a message waited for at
//! either end, a dial or a busy machine, makes single ones late and is no distance (as BBR's
//! round-trip propagation time, ACM Queue 2016).

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use parking_lot::Mutex;

/// Answers of one peer: a way that became longer is known after so many heartbeats.
const KEPT: usize = 8;

#[derive(Default)]
pub(super) struct RoundTrips(Mutex<HashMap<u64, VecDeque<Duration>>>);

impl RoundTrips {
    pub(super) fn add(&self, peer: u64, round_trip: Duration) {
        let mut all = self.0.lock();
        let latest = all.entry(peer).or_default();
        if latest.len() == KEPT {
            latest.pop_front();
        }
        latest.push_back(round_trip);
    }

    /// Nothing if it was never measured.
    pub(super) fn to(&self, peer: u64) -> Duration {
        self.0.lock().get(&peer).map(least).unwrap_or_default()
    }
}

fn least(latest: &VecDeque<Duration>) -> Duration {
    latest.iter().min().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_waited_is_no_distance_and_a_longer_way_is() {
        let round_trips = RoundTrips::default();
        let ms = Duration::from_millis;
        assert_eq!(round_trips.to(2), ms(0));
        for took in [900, 300, 310, 2000] {
            round_trips.add(2, ms(took));
        }
        round_trips.add(3, ms(80));
        assert_eq!((round_trips.to(2), round_trips.to(3)), (ms(300), ms(80)));
        for _ in 0..KEPT {
            round_trips.add(2, ms(500));
        }
        assert_eq!(round_trips.to(2), ms(500));
    }
}
