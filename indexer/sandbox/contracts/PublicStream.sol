// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// The seven documented events that speak of all programmes of a factory. Loyfin's documents do not say which contract
/// emits them (the factory, or a hub that serves several factories), so the sandbox can do both: the factory is such a
/// stream itself, and LoyfinHub is one that a factory can be told to use instead.
abstract contract PublicStream {
    event LoyaltyProgramCreated(
        address indexed factory,
        address indexed issuer,
        bytes32 indexed loyaltyId,
        address loyalty,
        string name,
        string symbol,
        string media,
        string description,
        string contractURI,
        string tokenURI
    );
    event PointsIssued(
        address indexed factory,
        address indexed issuer,
        bytes32 indexed loyaltyId,
        address loyalty,
        address to,
        uint256 tokenId,
        uint256 amount,
        bytes32 nonce,
        bytes32 operationHash,
        bytes data
    );
    event PointsRedeemed(
        address indexed factory,
        address indexed issuer,
        bytes32 indexed loyaltyId,
        address loyalty,
        address from,
        uint256 tokenId,
        uint256 amount,
        bytes32 nonce,
        bytes32 operationHash,
        bytes data
    );
    event LoyaltyTransfer(
        address indexed loyalty,
        address indexed operator,
        address indexed from,
        address to,
        uint256 tokenId,
        uint256 amount
    );
    event LoyaltyBatchTransfer(
        address indexed loyalty,
        address indexed operator,
        address indexed from,
        address to,
        uint256[] tokenIds,
        uint256[] amounts
    );
    event LoyaltyMetadataUpdated(
        address indexed loyalty,
        uint256 indexed tokenId,
        string tokenURI,
        string contractURI
    );
    event LoyaltyAdminOperation(
        address indexed loyalty,
        address indexed owner,
        bytes32 indexed action,
        bytes32 nonce
    );

    error NotAnnouncer(address caller);

    /// What a programme is born with; part of every signed issuance, since the first one creates the programme.
    struct Metadata {
        bytes32 loyaltyId;
        string name;
        string symbol;
        string media;
        string description;
        string contractURI;
        string tokenURI;
    }

    struct Movement {
        address factory;
        address issuer;
        bytes32 loyaltyId;
        address loyalty;
        address holder;
        uint256 tokenId;
        uint256 amount;
        bytes32 nonce;
        bytes32 operationHash;
        bytes data;
    }

    /// Factories that may speak through this stream.
    mapping(address => bool) public announcers;

    modifier onlyAnnouncer() {
        if (!announcers[msg.sender]) revert NotAnnouncer(msg.sender);
        _;
    }

    // `memory`: six strings in calldata take twelve places on a stack that has sixteen
    function announceProgram(address issuer, address loyalty, Metadata memory m) external onlyAnnouncer {
        emit LoyaltyProgramCreated(
            msg.sender, issuer, m.loyaltyId, loyalty, m.name, m.symbol, m.media, m.description, m.contractURI, m.tokenURI
        );
    }

    function announceIssued(Movement calldata m) external onlyAnnouncer {
        emit PointsIssued(
            m.factory, m.issuer, m.loyaltyId, m.loyalty, m.holder, m.tokenId, m.amount, m.nonce, m.operationHash, m.data
        );
    }

    function announceRedeemed(Movement calldata m) external onlyAnnouncer {
        emit PointsRedeemed(
            m.factory, m.issuer, m.loyaltyId, m.loyalty, m.holder, m.tokenId, m.amount, m.nonce, m.operationHash, m.data
        );
    }

    function announceTransfer(
        address loyalty,
        address operator,
        address from,
        address to,
        uint256 tokenId,
        uint256 amount
    ) external onlyAnnouncer {
        emit LoyaltyTransfer(loyalty, operator, from, to, tokenId, amount);
    }

    function announceBatchTransfer(
        address loyalty,
        address operator,
        address from,
        address to,
        uint256[] calldata tokenIds,
        uint256[] calldata amounts
    ) external onlyAnnouncer {
        emit LoyaltyBatchTransfer(loyalty, operator, from, to, tokenIds, amounts);
    }

    function announceMetadata(address loyalty, uint256 tokenId, string calldata tokenURI, string calldata contractURI)
        external
        onlyAnnouncer
    {
        emit LoyaltyMetadataUpdated(loyalty, tokenId, tokenURI, contractURI);
    }

    function announceAdminOperation(address loyalty, address owner, bytes32 action, bytes32 nonce)
        external
        onlyAnnouncer
    {
        emit LoyaltyAdminOperation(loyalty, owner, action, nonce);
    }
}

/// A stream of its own address that several factories may share. Whoever deployed it says which.
contract LoyfinHub is PublicStream {
    address public immutable operator = msg.sender;

    error NotOperator(address caller);

    function admit(address factory) external {
        if (msg.sender != operator) revert NotOperator(msg.sender);
        announcers[factory] = true;
    }
}
