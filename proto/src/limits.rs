//! Every bound of the contract, one constant and one reason each.

use std::time::Duration;

/// Longest key. Long enough for a URL, short enough that a scan page of keys alone stays small.
pub const KEY_BYTES_MAX: usize = 1024;
/// Largest value unless a policy says otherwise.
pub const VALUE_BYTES_DEFAULT: usize = 1 << 20;
/// Largest value ever: every message limit below derives from it.
pub const VALUE_BYTES_MAX: usize = 8 << 20;
/// What a message may need beside its values: keys, tags, headers.
pub const MESSAGE_OVERHEAD_BYTES: usize = 2 << 20;
/// Largest client message, either way.
pub const CLIENT_MESSAGE_BYTES_MAX: usize = VALUE_BYTES_MAX + MESSAGE_OVERHEAD_BYTES;
/// A batch of log entries is cut here, though it carries at least one entry.
pub const APPEND_BATCH_BYTES: usize = 2 << 20;
/// Largest peer message: one batch at its bound plus one entry of the largest value.
pub const PEER_MESSAGE_BYTES_MAX: usize =
    APPEND_BATCH_BYTES + VALUE_BYTES_MAX + MESSAGE_OVERHEAD_BYTES;

/// Keys of one BatchGet.
pub const BATCH_KEYS_MAX: usize = 1000;
/// Values of one BatchGet answer together; keys beyond it are answered RESOURCE_EXHAUSTED one by
/// one.
pub const BATCH_BYTES_MAX: usize = VALUE_BYTES_MAX;
/// Entries of one Scan page.
pub const SCAN_LIMIT_MAX: u32 = 1000;
/// Entries of one Scan page when the request names no limit.
pub const SCAN_LIMIT_DEFAULT: u32 = 100;
/// A Scan message is cut here, though it carries at least one entry.
pub const SCAN_MESSAGE_BYTES: usize = 256 << 10;

/// Tags of one entry.
pub const TAGS_MAX: usize = 64;
/// Longest tag.
pub const TAG_BYTES_MAX: usize = 256;
/// Longest content type.
pub const CONTENT_TYPE_BYTES_MAX: usize = 256;

/// Commands of one log entry.
pub const ENTRY_COMMANDS_MAX: usize = 1024;
/// Bytes of one log entry's commands; one larger command stands alone.
pub const ENTRY_BYTES_MAX: usize = 1 << 20;

/// Outcomes the state remembers of one client.
pub const OUTCOMES_PER_CLIENT_MAX: usize = 1024;
/// Clients whose outcomes the state remembers.
pub const CLIENTS_MAX: usize = 100_000;
/// Log time after which a silent client's outcomes are forgotten.
pub const CLIENT_IDLE: Duration = Duration::from_secs(600);
/// Log time a Delete goes on fencing older fetches: longer than any fetch may take.
pub const TOMBSTONE_KEPT: Duration = Duration::from_secs(600);
/// Longest fetch or lease.
pub const FETCH_TIMEOUT_MAX: Duration = Duration::from_secs(300);

/// A call without a deadline gets this one.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(5);

/// Size of a request id's client part.
pub const CLIENT_ID_BYTES: usize = 16;
