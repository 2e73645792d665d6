// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// EIP-712 for the sandbox. Loyfin documents the fields that a brand signs, but neither the domain nor the type strings:
/// name, version, the primary type names and the order of the members below are the sandbox's own. A signature made for the
/// sandbox is worth nothing on Loyfin's contracts, and the other way round.
abstract contract Signatures {
    bytes32 private constant DOMAIN_TYPE =
        keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");

    error BadSignature(address expected);

    /// Computed on each call: token contracts are clones, whose address differs from that of the code's constructor.
    function domainSeparator() public view returns (bytes32) {
        return keccak256(
            abi.encode(DOMAIN_TYPE, keccak256("LoyfinSandbox"), keccak256("1"), block.chainid, address(this))
        );
    }

    function _requireSigned(address signer, bytes32 structHash, bytes calldata signature) internal view {
        if (signature.length != 65) revert BadSignature(signer);
        bytes32 digest = keccak256(abi.encodePacked(hex"1901", domainSeparator(), structHash));
        address recovered =
            ecrecover(digest, uint8(signature[64]), bytes32(signature[0:32]), bytes32(signature[32:64]));
        if (recovered == address(0) || recovered != signer) revert BadSignature(signer);
    }
}
