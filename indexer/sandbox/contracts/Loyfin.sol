// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {LoyaltyToken} from "./LoyaltyToken.sol";
import {PublicStream} from "./PublicStream.sol";
import {Signatures} from "./Signatures.sol";
import {Speaker} from "./Speaker.sol";

interface IFeeToken {
    function transferFrom(address from, address to, uint256 value) external returns (bool);
}

/// The factory: brands sign, anyone submits, the customer pays the fee, programmes come to life with their first issuance.
/// Events, fields and rules are those that Loyfin documents; names of functions' structs, custom errors, the fee's split and
/// the EIP-712 types are the sandbox's own, since the documents leave them out.
contract Loyfin is PublicStream, Signatures {
    struct Issuance {
        address issuer;
        address to;
        bytes32 loyaltyId;
        uint256 amount;
        uint256 expiresAt;
        uint256 deadline;
        bytes32 nonce;
        uint256 chainId;
        address verifyingContract;
        bytes32 operationHash;
        Metadata metadata;
        bytes data;
    }

    struct Redemption {
        address issuer;
        address from;
        bytes32 loyaltyId;
        uint256 amount;
        uint256 expiresAt;
        uint256 deadline;
        bytes32 nonce;
        uint256 chainId;
        address verifyingContract;
        bytes32 operationHash;
        bytes data;
    }

    bytes32 private constant METADATA_TYPE = keccak256(
        "Metadata(bytes32 loyaltyId,string name,string symbol,string media,string description,string contractURI,"
        "string tokenURI)"
    );
    bytes32 private constant ISSUANCE_TYPE = keccak256(
        "Issuance(address issuer,address to,bytes32 loyaltyId,uint256 amount,uint256 expiresAt,uint256 deadline,"
        "bytes32 nonce,uint256 chainId,address verifyingContract,bytes32 operationHash,Metadata metadata,bytes data)"
        "Metadata(bytes32 loyaltyId,string name,string symbol,string media,string description,string contractURI,"
        "string tokenURI)"
    );
    bytes32 private constant REDEMPTION_TYPE = keccak256(
        "Redemption(address issuer,address from,bytes32 loyaltyId,uint256 amount,uint256 expiresAt,uint256 deadline,"
        "bytes32 nonce,uint256 chainId,address verifyingContract,bytes32 operationHash,bytes data)"
    );

    error ZeroAmount();
    error DeadlinePassed(uint256 deadline, uint256 nowSeconds);
    error NonceUsed(address issuer, bytes32 nonce);
    error WrongTarget(uint256 chainId, address verifyingContract);
    error WrongMetadata(bytes32 loyaltyId);
    error UnknownProgram(address issuer, bytes32 loyaltyId);
    error TooLong(string field, uint256 size, uint256 limit);
    error NotLoyalty(address caller);

    address public immutable feeToken;
    uint256 public immutable requiredFee; // base units of feeToken
    address public immutable protocolReceiver;
    PublicStream public immutable stream; // this contract, or a hub
    address private immutable implementation;

    /// Two tenths to the issuer, five to whoever submits, three to the protocol: an assumption, the split is not documented.
    uint256 public constant ISSUER_FEE_BPS = 2000;
    uint256 public constant RELAYER_FEE_BPS = 5000;

    mapping(address => mapping(bytes32 => address)) private programs;
    mapping(address => bool) public isLoyalty;
    /// One space per issuer for issuances and redemptions together.
    mapping(address => mapping(bytes32 => bool)) public nonceUsed;

    constructor(address feeToken_, uint256 requiredFee_, address protocolReceiver_, address hub) {
        feeToken = feeToken_;
        requiredFee = requiredFee_;
        protocolReceiver = protocolReceiver_;
        stream = PublicStream(hub == address(0) ? address(this) : hub);
        implementation = address(new LoyaltyToken());
        announcers[address(this)] = true;
    }

    /// The programme's token, or zero before its first issuance.
    function getLoyalty(address issuer, bytes32 loyaltyId) external view returns (address) {
        return programs[issuer][loyaltyId];
    }

    function issue(Issuance calldata a, bytes calldata signature) external {
        _requireExecutable(a.amount, a.deadline, a.chainId, a.verifyingContract, a.data);
        if (a.metadata.loyaltyId != a.loyaltyId) revert WrongMetadata(a.metadata.loyaltyId);
        _requireSigned(a.issuer, _hash(a), signature);
        _useNonce(a.issuer, a.nonce);

        // Metadata of later issuances is signed and ignored: no document says that it changes the programme.
        address loyalty = programs[a.issuer][a.loyaltyId];
        if (loyalty == address(0)) loyalty = _create(a.issuer, a.metadata);
        LoyaltyToken(payable(loyalty)).mint(a.to, a.expiresAt, a.amount);
        _collectFee(a.to, a.issuer);
        stream.announceIssued(
            Movement(
                address(this),
                a.issuer,
                a.loyaltyId,
                loyalty,
                a.to,
                a.expiresAt,
                a.amount,
                a.nonce,
                a.operationHash,
                a.data
            )
        );
    }

    function redeem(Redemption calldata a, bytes calldata signature) external {
        _requireExecutable(a.amount, a.deadline, a.chainId, a.verifyingContract, a.data);
        _requireSigned(a.issuer, _hash(a), signature);
        _useNonce(a.issuer, a.nonce);

        address loyalty = programs[a.issuer][a.loyaltyId];
        if (loyalty == address(0)) revert UnknownProgram(a.issuer, a.loyaltyId);
        LoyaltyToken(payable(loyalty)).burn(a.from, a.expiresAt, a.amount);
        _collectFee(a.from, a.issuer);
        stream.announceRedeemed(
            Movement(
                address(this),
                a.issuer,
                a.loyaltyId,
                loyalty,
                a.from,
                a.expiresAt,
                a.amount,
                a.nonce,
                a.operationHash,
                a.data
            )
        );
    }

    // ---- what tokens report

    modifier onlyLoyalty() {
        if (!isLoyalty[msg.sender]) revert NotLoyalty(msg.sender);
        _;
    }

    function onTransfer(address operator, address from, address to, uint256 tokenId, uint256 amount)
        external
        onlyLoyalty
    {
        stream.announceTransfer(msg.sender, operator, from, to, tokenId, amount);
    }

    function onBatchTransfer(
        address operator,
        address from,
        address to,
        uint256[] calldata tokenIds,
        uint256[] calldata amounts
    ) external onlyLoyalty {
        stream.announceBatchTransfer(msg.sender, operator, from, to, tokenIds, amounts);
    }

    function onMetadata(uint256 tokenId, string calldata tokenURI, string calldata contractURI) external onlyLoyalty {
        stream.announceMetadata(msg.sender, tokenId, tokenURI, contractURI);
    }

    function onAdminOperation(address owner, bytes32 action, bytes32 nonce) external onlyLoyalty {
        stream.announceAdminOperation(msg.sender, owner, action, nonce);
    }

    // ---- inside

    function _create(address issuer, Metadata calldata m) internal returns (address loyalty) {
        _requireAtMost("name", bytes(m.name).length, 96);
        _requireAtMost("symbol", bytes(m.symbol).length, 24);
        _requireAtMost("media", bytes(m.media).length, 512);
        _requireAtMost("description", bytes(m.description).length, 1024);
        _requireAtMost("contractURI", bytes(m.contractURI).length, 512);
        _requireAtMost("tokenURI", bytes(m.tokenURI).length, 512);
        loyalty = _clone(implementation);
        programs[issuer][m.loyaltyId] = loyalty;
        isLoyalty[loyalty] = true;
        LoyaltyToken(payable(loyalty)).initialize(issuer, m.loyaltyId, m.name, m.symbol, m.contractURI, m.tokenURI);
        stream.announceProgram(issuer, loyalty, m);
    }

    /// ERC-1167: a programme costs a tenth of the gas of a full copy of the token's code.
    function _clone(address code) private returns (address copy) {
        bytes memory creation =
            abi.encodePacked(hex"3d602d80600a3d3981f3363d3d373d3d3d363d73", code, hex"5af43d82803e903d91602b57fd5bf3");
        assembly ("memory-safe") {
            copy := create(0, add(creation, 32), mload(creation))
        }
        require(copy != address(0), "clone failed");
    }

    function _requireExecutable(
        uint256 amount,
        uint256 deadline,
        uint256 chainId,
        address verifyingContract,
        bytes calldata data
    ) private view {
        if (amount == 0) revert ZeroAmount();
        if (chainId != block.chainid || verifyingContract != address(this)) {
            revert WrongTarget(chainId, verifyingContract);
        }
        // documented as the last second for execution: that second itself is still valid
        if (deadline != 0 && block.timestamp > deadline) revert DeadlinePassed(deadline, block.timestamp);
        _requireAtMost("data", data.length, 2048);
    }

    function _requireAtMost(string memory field, uint256 size, uint256 limit) private pure {
        if (size > limit) revert TooLong(field, size, limit);
    }

    function _useNonce(address issuer, bytes32 nonce) private {
        if (nonceUsed[issuer][nonce]) revert NonceUsed(issuer, nonce);
        nonceUsed[issuer][nonce] = true;
    }

    function _collectFee(address customer, address issuer) private {
        if (requiredFee == 0) return;
        uint256 issuerShare = requiredFee * ISSUER_FEE_BPS / 10_000;
        uint256 relayerShare = requiredFee * RELAYER_FEE_BPS / 10_000;
        IFeeToken(feeToken).transferFrom(customer, issuer, issuerShare);
        IFeeToken(feeToken).transferFrom(customer, msg.sender, relayerShare);
        IFeeToken(feeToken).transferFrom(customer, protocolReceiver, requiredFee - issuerShare - relayerShare);
    }

    function _hash(Metadata calldata m) private pure returns (bytes32) {
        return keccak256(
            abi.encode(
                METADATA_TYPE,
                m.loyaltyId,
                keccak256(bytes(m.name)),
                keccak256(bytes(m.symbol)),
                keccak256(bytes(m.media)),
                keccak256(bytes(m.description)),
                keccak256(bytes(m.contractURI)),
                keccak256(bytes(m.tokenURI))
            )
        );
    }

    function _hash(Issuance calldata a) private pure returns (bytes32) {
        bytes memory head =
            abi.encode(ISSUANCE_TYPE, a.issuer, a.to, a.loyaltyId, a.amount, a.expiresAt, a.deadline, a.nonce);
        bytes memory tail =
            abi.encode(a.chainId, a.verifyingContract, a.operationHash, _hash(a.metadata), keccak256(a.data));
        return keccak256(bytes.concat(head, tail));
    }

    function _hash(Redemption calldata a) private pure returns (bytes32) {
        bytes memory head =
            abi.encode(REDEMPTION_TYPE, a.issuer, a.from, a.loyaltyId, a.amount, a.expiresAt, a.deadline, a.nonce);
        bytes memory tail = abi.encode(a.chainId, a.verifyingContract, a.operationHash, keccak256(a.data));
        return keccak256(bytes.concat(head, tail));
    }
}

/// A factory for volume: it says what it is asked to, without signatures, fees or balances, and can say anything at all
/// (Speaker). Configure its address as a factory to fill a history or to play a trusted emitter that misbehaves.
contract BurstFactory is Loyfin, Speaker {
    constructor() Loyfin(address(0), 0, address(0), address(0)) {}

    /// Creates the caller's programme without issuing anything.
    function create(Metadata calldata m) external {
        _create(msg.sender, m);
    }

    struct Burst {
        bool issued;
        bytes32 loyaltyId;
        uint256 count;
        uint256 firstNonce;
        address firstHolder;
        uint256 holders;
        uint256 tokenId;
        uint256 amount;
    }

    /// `count` PointsIssued or PointsRedeemed of the caller's programme in one transaction. Nonces are `firstNonce`,
    /// `firstNonce + 1` and so on; holders are `firstHolder` onwards, `holders` of them in turn; each operation hash is the
    /// keccak256 of its nonce. Balances do not change.
    function burst(Burst calldata b) external {
        address loyalty = this.getLoyalty(msg.sender, b.loyaltyId);
        if (loyalty == address(0)) revert UnknownProgram(msg.sender, b.loyaltyId);
        Movement memory m;
        m.factory = address(this);
        m.issuer = msg.sender;
        m.loyaltyId = b.loyaltyId;
        m.loyalty = loyalty;
        m.tokenId = b.tokenId;
        m.amount = b.amount;
        for (uint256 i; i < b.count; ++i) {
            m.holder = address(uint160(b.firstHolder) + uint160(i % b.holders));
            m.nonce = bytes32(b.firstNonce + i);
            m.operationHash = keccak256(abi.encode(m.nonce));
            _emit(b.issued, m);
        }
    }

    function _emit(bool issued, Movement memory m) private {
        if (issued) {
            emit PointsIssued(
                m.factory, m.issuer, m.loyaltyId, m.loyalty, m.holder, m.tokenId, m.amount, m.nonce, m.operationHash, m.data
            );
        } else {
            emit PointsRedeemed(
                m.factory, m.issuer, m.loyaltyId, m.loyalty, m.holder, m.tokenId, m.amount, m.nonce, m.operationHash, m.data
            );
        }
    }
}
