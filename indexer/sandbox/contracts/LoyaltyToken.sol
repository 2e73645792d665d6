// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Signatures} from "./Signatures.sol";
import {Speaker} from "./Speaker.sol";

/// What a token asks of the factory that made it.
interface ILoyfin {
    function protocolReceiver() external view returns (address);
    function onTransfer(address operator, address from, address to, uint256 tokenId, uint256 amount) external;
    function onBatchTransfer(
        address operator,
        address from,
        address to,
        uint256[] calldata tokenIds,
        uint256[] calldata amounts
    ) external;
    function onMetadata(uint256 tokenId, string calldata tokenURI, string calldata contractURI) external;
    function onAdminOperation(address owner, bytes32 action, bytes32 nonce) external;
}

/// One loyalty programme: balances by (bucket, holder), where the bucket's id is the Unix second of its expiry (0: never),
/// the owner's settings, and the royalties. Every programme is a clone of one implementation that its factory deploys.
///
/// `speak` (from Speaker) is open to anyone and exists in the sandbox only: it turns a real programme into a rogue one.
contract LoyaltyToken is Signatures, Speaker {
    // documented, token-local
    event AdminOperationExecuted(address indexed owner, bytes32 indexed action, bytes32 indexed nonce);
    event OwnershipTransferred(address indexed previousOwner, address indexed newOwner);
    event AdminEpochUpdated(uint256 adminEpoch);
    event RoyaltyBpsUpdated(uint96 royaltyBps);
    event RoyaltyReceiverUpdated(address indexed receiver);
    event RoyaltiesWithdrawn(
        address indexed issuerReceiver, address indexed protocolReceiver, uint256 issuerAmount, uint256 protocolAmount
    );
    event RoyaltyWithdrawalFailed(address indexed receiver, uint256 amount);
    // inferred: the document is cut after "IssuableUpdated(bool"
    event IssuableUpdated(bool issuable);
    event RedeemableUpdated(bool redeemable);
    event TransferableUpdated(bool transferable);
    // inferred: ERC-1155, ERC-7572, ERC-4906
    event TransferSingle(
        address indexed operator, address indexed from, address indexed to, uint256 id, uint256 value
    );
    event TransferBatch(
        address indexed operator, address indexed from, address indexed to, uint256[] ids, uint256[] values
    );
    event ApprovalForAll(address indexed account, address indexed operator, bool approved);
    event URI(string value, uint256 indexed id);
    event ContractURIUpdated();

    error AlreadyInitialized();
    error NotFactory(address caller);
    error NotOwner(address caller, address owner);
    error NotApproved(address operator, address holder);
    error NotIssuable();
    error NotRedeemable();
    error NotTransferable();
    error BucketExpired(uint256 tokenId, uint256 nowSeconds);
    error BalanceTooLow(address holder, uint256 tokenId, uint256 balance, uint256 needed);
    error LengthMismatch();
    error DeadlinePassed(uint256 deadline, uint256 nowSeconds);
    error NonceUsed(bytes32 nonce);
    error StaleEpoch(uint256 signed, uint256 current);
    error WrongTarget(uint256 chainId, address verifyingContract, bytes32 loyaltyId);
    error UnknownAction(bytes32 action);
    error TooLong(string field, uint256 size, uint256 limit);
    error RoyaltyTooHigh(uint256 bps);

    /// One flat shape for every action, as documented; an action reads only its own fields.
    struct AdminAction {
        address owner;
        uint256 adminEpoch;
        bytes32 loyaltyId;
        bytes32 nonce;
        uint256 chainId;
        address verifyingContract;
        uint256 deadline;
        bytes32 action;
        uint256 tokenId;
        string uri;
        address account;
        uint96 royaltyBps;
        bool flag;
        bytes data;
    }

    bytes32 private constant ADMIN_TYPE = keccak256(
        "AdminAction(address owner,uint256 adminEpoch,bytes32 loyaltyId,bytes32 nonce,uint256 chainId,"
        "address verifyingContract,uint256 deadline,bytes32 action,uint256 tokenId,string uri,address account,"
        "uint96 royaltyBps,bool flag,bytes data)"
    );

    address public factory;
    address public issuer;
    bytes32 public loyaltyId;
    address public owner;
    uint256 public adminEpoch;
    bool public issuable;
    bool public redeemable;
    bool public transferable;
    uint96 public royaltyBps;
    address public royaltyReceiver;
    string public name;
    string public symbol;
    string public contractURI;
    string private defaultURI;
    mapping(uint256 => string) private bucketURI;
    mapping(uint256 => mapping(address => uint256)) private balances;
    mapping(address => mapping(address => bool)) public isApprovedForAll;
    mapping(bytes32 => bool) public adminNonceUsed;

    /// Royalties that came in and are not paid out yet, and who still has which share of earlier ones to take.
    uint256 private allotted;
    uint256 public issuerPending;
    uint256 public protocolPending;
    /// Protocol's share of marketplace royalties: an assumption, the real split is not documented.
    uint256 public constant PROTOCOL_SHARE_BPS = 1000;

    modifier onlyFactory() {
        if (msg.sender != factory) revert NotFactory(msg.sender);
        _;
    }

    modifier onlyOwner() {
        if (msg.sender != owner) revert NotOwner(msg.sender, owner);
        _;
    }

    /// The implementation itself must never become a programme.
    constructor() {
        factory = address(1);
    }

    /// Logs before the factory announces the programme: the token speaks before it is known.
    function initialize(
        address issuer_,
        bytes32 loyaltyId_,
        string calldata name_,
        string calldata symbol_,
        string calldata contractURI_,
        string calldata tokenURI_
    ) external {
        if (factory != address(0)) revert AlreadyInitialized();
        factory = msg.sender;
        issuer = issuer_;
        loyaltyId = loyaltyId_;
        name = name_;
        symbol = symbol_;
        contractURI = contractURI_;
        defaultURI = tokenURI_;
        royaltyReceiver = issuer_;
        (issuable, redeemable, transferable) = (true, true, true);
        owner = issuer_;
        emit OwnershipTransferred(address(0), issuer_);
    }

    // ---- balances

    function balanceOf(address holder, uint256 tokenId) external view returns (uint256) {
        return balances[tokenId][holder];
    }

    function uri(uint256 tokenId) external view returns (string memory) {
        return bytes(bucketURI[tokenId]).length > 0 ? bucketURI[tokenId] : defaultURI;
    }

    function mint(address to, uint256 tokenId, uint256 amount) external onlyFactory {
        if (!issuable) revert NotIssuable();
        _requireLive(tokenId);
        balances[tokenId][to] += amount;
        emit TransferSingle(msg.sender, address(0), to, tokenId, amount);
    }

    function burn(address from, uint256 tokenId, uint256 amount) external onlyFactory {
        if (!redeemable) revert NotRedeemable();
        _requireLive(tokenId);
        _take(from, tokenId, amount);
        emit TransferSingle(msg.sender, from, address(0), tokenId, amount);
    }

    function setApprovalForAll(address operator, bool approved) external {
        isApprovedForAll[msg.sender][operator] = approved;
        emit ApprovalForAll(msg.sender, operator, approved);
    }

    function safeTransferFrom(address from, address to, uint256 tokenId, uint256 amount, bytes calldata) external {
        _requireMayMove(from);
        _move(from, to, tokenId, amount);
        emit TransferSingle(msg.sender, from, to, tokenId, amount);
        ILoyfin(factory).onTransfer(msg.sender, from, to, tokenId, amount);
    }

    function safeBatchTransferFrom(
        address from,
        address to,
        uint256[] calldata tokenIds,
        uint256[] calldata amounts,
        bytes calldata
    ) external {
        _requireMayMove(from);
        if (tokenIds.length != amounts.length) revert LengthMismatch();
        for (uint256 i; i < tokenIds.length; ++i) _move(from, to, tokenIds[i], amounts[i]);
        emit TransferBatch(msg.sender, from, to, tokenIds, amounts);
        ILoyfin(factory).onBatchTransfer(msg.sender, from, to, tokenIds, amounts);
    }

    function _requireMayMove(address from) private view {
        if (!transferable) revert NotTransferable();
        if (msg.sender != from && !isApprovedForAll[from][msg.sender]) revert NotApproved(msg.sender, from);
    }

    /// Documented: expired buckets cannot be issued, redeemed or transferred. The exact second is not documented; here it is expired.
    function _requireLive(uint256 tokenId) private view {
        if (tokenId != 0 && block.timestamp >= tokenId) revert BucketExpired(tokenId, block.timestamp);
    }

    function _move(address from, address to, uint256 tokenId, uint256 amount) private {
        _requireLive(tokenId);
        _take(from, tokenId, amount);
        balances[tokenId][to] += amount;
    }

    function _take(address from, uint256 tokenId, uint256 amount) private {
        uint256 balance = balances[tokenId][from];
        if (balance < amount) revert BalanceTooLow(from, tokenId, balance, amount);
        balances[tokenId][from] = balance - amount;
    }

    // ---- the owner's settings, by a direct transaction

    function transferOwnership(address newOwner) external onlyOwner {
        _setOwner(newOwner);
    }

    function renounceOwnership() external onlyOwner {
        _setOwner(address(0));
    }

    function setIssuable(bool on) external onlyOwner {
        _setIssuable(on);
    }

    function setRedeemable(bool on) external onlyOwner {
        _setRedeemable(on);
    }

    function setTransferable(bool on) external onlyOwner {
        _setTransferable(on);
    }

    function setRoyaltyBps(uint96 bps) external onlyOwner {
        _setRoyaltyBps(bps);
    }

    function setRoyaltyReceiver(address receiver) external onlyOwner {
        _setRoyaltyReceiver(receiver);
    }

    function setTokenURI(uint256 tokenId, string calldata value) external onlyOwner {
        _setTokenURI(tokenId, value);
    }

    function setContractURI(string calldata value) external onlyOwner {
        _setContractURI(value);
    }

    // ---- the same settings, signed by the owner and submitted by anyone

    function executeAdmin(AdminAction calldata a, bytes calldata signature) external {
        if (owner == address(0) || a.owner != owner) revert NotOwner(a.owner, owner);
        if (a.chainId != block.chainid || a.verifyingContract != address(this) || a.loyaltyId != loyaltyId) {
            revert WrongTarget(a.chainId, a.verifyingContract, a.loyaltyId);
        }
        if (a.adminEpoch != adminEpoch) revert StaleEpoch(a.adminEpoch, adminEpoch);
        if (a.deadline != 0 && block.timestamp > a.deadline) revert DeadlinePassed(a.deadline, block.timestamp);
        if (adminNonceUsed[a.nonce]) revert NonceUsed(a.nonce);
        if (a.data.length > 2048) revert TooLong("data", a.data.length, 2048);
        _requireSigned(a.owner, _hash(a), signature);
        adminNonceUsed[a.nonce] = true;

        if (a.action == keccak256("SET_ISSUABLE")) _setIssuable(a.flag);
        else if (a.action == keccak256("SET_REDEEMABLE")) _setRedeemable(a.flag);
        else if (a.action == keccak256("SET_TRANSFERABLE")) _setTransferable(a.flag);
        else if (a.action == keccak256("SET_ROYALTY_BPS")) _setRoyaltyBps(a.royaltyBps);
        else if (a.action == keccak256("SET_ROYALTY_RECEIVER")) _setRoyaltyReceiver(a.account);
        else if (a.action == keccak256("SET_TOKEN_URI")) _setTokenURI(a.tokenId, a.uri);
        else if (a.action == keccak256("SET_CONTRACT_URI")) _setContractURI(a.uri);
        else if (a.action == keccak256("TRANSFER_OWNERSHIP")) _setOwner(a.account);
        else if (a.action == keccak256("RENOUNCE_OWNERSHIP")) _setOwner(address(0));
        else revert UnknownAction(a.action);

        emit AdminOperationExecuted(a.owner, a.action, a.nonce);
        ILoyfin(factory).onAdminOperation(a.owner, a.action, a.nonce);
    }

    function _hash(AdminAction calldata a) private pure returns (bytes32) {
        // in two halves, joined: fourteen words at once are too many for the stack
        bytes memory head = abi.encode(
            ADMIN_TYPE, a.owner, a.adminEpoch, a.loyaltyId, a.nonce, a.chainId, a.verifyingContract, a.deadline
        );
        bytes memory tail = abi.encode(
            a.action, a.tokenId, keccak256(bytes(a.uri)), a.account, a.royaltyBps, a.flag, keccak256(a.data)
        );
        return keccak256(bytes.concat(head, tail));
    }

    /// Every change of owner voids the admin actions signed before it.
    function _setOwner(address newOwner) private {
        emit OwnershipTransferred(owner, newOwner);
        owner = newOwner;
        emit AdminEpochUpdated(++adminEpoch);
    }

    function _setIssuable(bool on) private {
        issuable = on;
        emit IssuableUpdated(on);
    }

    function _setRedeemable(bool on) private {
        redeemable = on;
        emit RedeemableUpdated(on);
    }

    function _setTransferable(bool on) private {
        transferable = on;
        emit TransferableUpdated(on);
    }

    function _setRoyaltyBps(uint96 bps) private {
        if (bps > 10_000) revert RoyaltyTooHigh(bps);
        royaltyBps = bps;
        emit RoyaltyBpsUpdated(bps);
    }

    function _setRoyaltyReceiver(address receiver) private {
        royaltyReceiver = receiver;
        emit RoyaltyReceiverUpdated(receiver);
    }

    function _setTokenURI(uint256 tokenId, string calldata value) private {
        if (bytes(value).length > 512) revert TooLong("tokenURI", bytes(value).length, 512);
        bucketURI[tokenId] = value;
        emit URI(value, tokenId);
        ILoyfin(factory).onMetadata(tokenId, value, contractURI);
    }

    function _setContractURI(string calldata value) private {
        if (bytes(value).length > 512) revert TooLong("contractURI", bytes(value).length, 512);
        contractURI = value;
        emit ContractURIUpdated();
        ILoyfin(factory).onMetadata(0, defaultURI, value);
    }

    // ---- royalties, in the chain's own coin

    receive() external payable {}

    function royaltyInfo(uint256, uint256 salePrice) external view returns (address, uint256) {
        return (address(this), salePrice * royaltyBps / 10_000);
    }

    /// Anyone may push the shares out. A receiver that refuses keeps its share pending and does not stop the other one.
    function withdrawRoyalties() external {
        uint256 fresh = address(this).balance - allotted;
        uint256 protocolFresh = fresh * PROTOCOL_SHARE_BPS / 10_000;
        allotted += fresh;
        issuerPending += fresh - protocolFresh;
        protocolPending += protocolFresh;

        address protocolReceiver = ILoyfin(factory).protocolReceiver();
        uint256 issuerAmount = issuerPending;
        uint256 protocolAmount = protocolPending;
        (issuerPending, protocolPending) = (0, 0);
        if (!_pay(royaltyReceiver, issuerAmount)) (issuerPending, issuerAmount) = (issuerAmount, 0);
        if (!_pay(protocolReceiver, protocolAmount)) (protocolPending, protocolAmount) = (protocolAmount, 0);
        emit RoyaltiesWithdrawn(royaltyReceiver, protocolReceiver, issuerAmount, protocolAmount);
    }

    function _pay(address receiver, uint256 amount) private returns (bool paid) {
        if (amount == 0) return true;
        allotted -= amount;
        (paid,) = receiver.call{value: amount}("");
        if (!paid) {
            allotted += amount;
            emit RoyaltyWithdrawalFailed(receiver, amount);
        }
    }
}
