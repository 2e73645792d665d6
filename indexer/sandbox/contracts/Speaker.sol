// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// Emits any log from its own address: the means to test what an indexer believes. Nothing like it exists in Loyfin.
/// On LookAlike it is a stranger who copies public events; on a programme's token, a programme that speaks for another one;
/// on BurstFactory, a trusted emitter that repeats itself or sends hostile strings.
abstract contract Speaker {
    error TooManyTopics(uint256 count);

    function speak(bytes32[] calldata topics, bytes calldata data) external {
        _log(topics, data);
    }

    /// The data is `head` followed by `size` times the byte `fill`: megabytes of log without megabytes of calldata.
    function speakAtLength(bytes32[] calldata topics, bytes calldata head, uint256 size, bytes1 fill) external {
        bytes memory data = new bytes(head.length + size);
        assembly ("memory-safe") {
            let start := add(data, 32)
            calldatacopy(start, head.offset, head.length)
            if size {
                mstore8(add(start, head.length), byte(0, fill))
                // doubling copies: the filled part is copied behind itself until `size` bytes are there
                let filled := 1
                for {} lt(filled, size) {} {
                    let more := filled
                    if gt(more, sub(size, filled)) { more := sub(size, filled) }
                    mcopy(add(add(start, head.length), filled), add(start, head.length), more)
                    filled := add(filled, more)
                }
            }
        }
        _log(topics, data);
    }

    function _log(bytes32[] calldata topics, bytes memory data) private {
        if (topics.length > 4) revert TooManyTopics(topics.length);
        assembly ("memory-safe") {
            let start := add(data, 32)
            let size := mload(data)
            let t := topics.offset
            switch topics.length
            case 0 { log0(start, size) }
            case 1 { log1(start, size, calldataload(t)) }
            case 2 { log2(start, size, calldataload(t), calldataload(add(t, 32))) }
            case 3 { log3(start, size, calldataload(t), calldataload(add(t, 32)), calldataload(add(t, 64))) }
            case 4 {
                log4(
                    start,
                    size,
                    calldataload(t),
                    calldataload(add(t, 32)),
                    calldataload(add(t, 64)),
                    calldataload(add(t, 96))
                )
            }
        }
    }
}

/// A stranger. It has no `receive`, so it also serves as the receiver that refuses royalties.
contract LookAlike is Speaker {}
